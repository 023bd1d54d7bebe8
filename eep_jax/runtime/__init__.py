"""Processes of a run, by room; only `rank` loads JAX.

`control`     the channel between supervisor, ranks and launchers
`text`        tokenizers, chat templates, stop strings
`rank`        the process that steps
`processes`   ranks' processes, here and on other hosts
`serving`     requests of clients
`history`     journal, events, status, metrics
`http`        OpenAI's API
`supervisor`  decisions carried out
"""
