"""Both ends of the control channel: authenticated WebSockets that carry MessagePack. No JAX.

`messages`         one frozen dataclass per message, and which end may send which
`codec`            messages as bytes and back, checked against their annotations
`server`           the supervisor's end: accepts who knows the token
`channels`         registry of the current connection of each rank
`rank_client`      a rank's end: a thread that keeps the connection, and two queues
`launcher_client`  a launcher's end: watches processes of its host
`endpoint`         the file that names the supervisor's ports, and connections to them
`run_dir`          its permissions, and its token
`run_owner`        who owns a run directory, on any file system
`identity`         ids of hosts, and processes as (pid, start)
"""
