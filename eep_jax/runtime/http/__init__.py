"""OpenAI's HTTP API, membership and metrics. No JAX.

`app`            routes and handlers
`access`         keys, origins and host names: who may call which route
`key_file`       keys of a file, read again when it changes
`completion`     checks of a completion request
`shaping_fields` checks of penalties, biases and their like
`neutral_fields` fields of which only values that change nothing are taken
`chat`           checks of a chat request, and its prompt
`tokens`         tokenizing and its reverse
`frame`          ids of requests, access log, CORS
`scale_request`  checks of a change of membership
`response`       answers and streams in OpenAI's forms
"""
