"""Processes of ranks: seen to begin to exit, seen to end, killed. No JAX.

`local`     those of the supervisor's host, by pidfd
`remote`    those of other hosts, by the launchers there
`registry`  both behind one interface
"""
