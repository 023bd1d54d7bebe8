"""Ports of the supervisor: after a restart the previous ones, if they are free."""

import contextlib

from aiohttp import web

from eep_jax.runtime.supervisor.connection_limits import LimitedRunner, Limits


class Listeners:
    """Open ports. `stop` accepts no more connections, `close` ends the open ones."""

    def __init__(self):
        self._runners: list[web.AppRunner] = []

    async def open(
        self,
        app: web.Application,
        host: str,
        port: int,
        before: int = 0,
        cancel_handlers: bool = False,
        limits: Limits | None = None,
    ) -> int:
        """Serves an application.

        Args:
          app: the application.
          host: the address to listen on.
          port: the port; 0 takes `before` if that is free, else any.
          before: the port of the previous supervisor; 0 if there was none.
          cancel_handlers: whether a client that leaves cancels its handler. Not for WebSockets:
            their handlers read what arrived before the end.
          limits: of the connections to this port; None takes the defaults.

        Returns:
          The port.

        Raises:
          OSError: the port is taken, or the address is not of this host.
        """
        runner = LimitedRunner(
            app,
            limits or Limits(),
            shutdown_timeout=1.0,
            handler_cancellation=cancel_handlers,
        )
        await runner.setup()
        self._runners.append(runner)
        if not port and before:
            with contextlib.suppress(OSError, OverflowError):
                await web.TCPSite(runner, host, before).start()
                return before
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as error:
            raise OSError(
                error.errno,
                f"cannot listen on {host}:{port}: {error.strerror}; "
                "choose another port (0: any free one)",
            ) from error
        return runner.addresses[0][1]

    async def stop(self) -> None:
        for runner in self._runners:
            for site in list(runner.sites):
                await site.stop()

    async def close(self) -> None:
        for runner in self._runners:
            await runner.cleanup()
