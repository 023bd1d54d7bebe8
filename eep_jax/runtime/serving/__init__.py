"""Requests of the cluster, from the client's submit to the last token. No JAX.

`contract`       what HTTP and the service agree on: requests, streams, errors
`request_table`  all requests, which rank has which, and the tokens so far
`dispatcher`     requests to ranks, and tokens back
`service`        requests and streams of clients
`assemble`       wiring of these, and which ranks take requests
"""
