"""The symmetric heap over several hosts: ranks of other hosts are mirrored, not mapped.

1. `MirrorHeap.attach` reads another host in the handle and connects to the peer's `MirrorServer`,
   which admits callers that know the run's token (`handshake.py`) and have the same layout. The
   peer's slab becomes staging memory of this process.
2. A kernel writes rows into it and posts a flag as everywhere. The peer's `MirrorSender`, a thread,
   sleeps on that flag (`signals.AnyFlag`: several futexes at once). No doorbell rings for it, and
   ranks of one host pay nothing for mirrors.
3. It packs what the flag announces (`frames.py`): only routing and rows that the peer needs. One
   buffer, no queue: a flag posted again before it was forwarded belongs to a later round.
4. The peer's server thread checks the frame, stores it in the regions of its writer, then posts the
   flag. Over NIXL (`nixl.py`) the writer puts the payload into landing memory of its own and the
   header follows as a notification; frames are checked and stored from there, so that no remote
   process writes into a window.
5. Frames count only from the heap attached now, over its newest connection: those of an evicted
   process are dropped, so its successor can be admitted as soon as no member shares a host with it.
   Banks are read over a separate connection, with a deadline.
"""
