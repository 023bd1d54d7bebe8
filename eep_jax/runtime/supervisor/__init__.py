"""The supervisor: decisions of the coordinator, carried out. No JAX.

`supervisor`       wiring, and the loop that ticks
`run_files`        the run directory: ownership and journal
`service`          what HTTP calls
`message_handler`  messages of ranks and launchers, routed
`message_checks`   whether a message fits the run
`admission`        the answer to a Hello, as a pure decision
`driver`           feeds the coordinator and carries its commands out
`listeners`        the ports
"""
