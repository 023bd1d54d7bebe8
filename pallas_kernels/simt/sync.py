"""Barriers, flags that other processes write or read, and waits with a deadline."""

from collections.abc import Callable

from pallas_kernels.simt.mlir import ir, mgpu, scf
from pallas_kernels.simt.word import Word, i32

ABORT_POLL_ROUNDS = 64  # polls of a flag per poll of the abort word, which is in host memory


def barrier() -> None:
    """Waits for all threads of the block; their earlier writes are visible to all of them after."""
    mgpu.inline_ptx("bar.sync 0;", result_types=None, convergent=True)


def group_barrier() -> None:
    """Waits for all 128 threads of this warpgroup."""
    mgpu.warpgroup_barrier()


def post(at: Word, value: Word) -> None:
    """Store-release at system scope.

    Earlier writes of this thread, and of preceding kernels, are visible before the flag.
    """
    mgpu.inline_ptx("st.release.sys.global.u32 [$0], $1;", at.value, value.value, result_types=None)


def post_on_gpu(at: Word, value: Word) -> None:
    """Like `post`, at GPU scope."""
    mgpu.inline_ptx("st.release.gpu.global.u32 [$0], $1;", at.value, value.value, result_types=None)


def _load(at: Word, order: str) -> Word:
    ptx = f"ld.{order}.sys.global.u32 $0, [$1];"
    return Word(mgpu.inline_ptx(ptx, at.value, result_types=i32(), has_side_effects=True))


def load_relaxed(at: Word) -> Word:
    """Relaxed load at system scope of a word that other processors write."""
    return _load(at, "relaxed")


def now_ns() -> Word:
    """The GPU's global timer in nanoseconds, 64 bits."""
    return Word(mgpu.globaltimer())


def wait_for(
    at: Word, wanted: Word, start: Word, limit_ns: Word, abort: Word | None, epoch: Word
) -> Word:
    """Waits until the word at `at` is `wanted`; returns 1 if it came, else 0.

    Ends `limit_ns` after `start`, or once the word at `abort` (None: never) exceeds `epoch`.
    Load-acquire at system scope: if 1, writes before the matching `post` are visible.
    """

    def poll(turn: Word, aborted: Word) -> tuple[Word, Word]:
        came = (_load(at, "acquire") == wanted).narrow()
        if abort is None:
            return came, aborted
        asks = turn % ABORT_POLL_ROUNDS == ABORT_POLL_ROUNDS - 1
        polls = scf.IfOp(asks.value, [i32()], has_else=True)
        with ir.InsertionPoint(polls.then_block):
            scf.yield_([(epoch.below(load_relaxed(abort))).narrow().value])
        with ir.InsertionPoint(polls.else_block):
            scf.yield_([aborted.value])
        return came, Word(polls.results[0])

    return _poll(poll, start, limit_ns)


def wait_on_gpu(at: Word, wanted: Word, otherwise: Word, start: Word, limit_ns: Word) -> Word:
    """Waits until the word at `at`, written by this GPU, is `wanted` or `otherwise`.

    Returns 1 for the first, 2 for the second, 0 if neither came within `limit_ns` of `start`.
    Load-acquire at GPU scope.
    """

    def poll(turn: Word, aborted: Word) -> tuple[Word, Word]:
        ptx = "ld.acquire.gpu.global.u32 $0, [$1];"
        seen = Word(mgpu.inline_ptx(ptx, at.value, result_types=i32(), has_side_effects=True))
        return (seen == wanted).narrow() + (seen == otherwise).narrow() * 2, aborted

    return _poll(poll, start, limit_ns)


def _poll(poll: Callable[[Word, Word], tuple[Word, Word]], start: Word, limit_ns: Word) -> Word:
    """Repeats `poll(turn, aborted) -> (came, aborted)` until either is not 0 or time is up."""
    loop = scf.WhileOp([i32()] * 3, [mgpu.c(0, i32())] * 3)
    before = loop.before.blocks.append(i32(), i32(), i32())
    with ir.InsertionPoint.at_block_begin(before):
        turn, aborted = Word(before.arguments[0]), Word(before.arguments[1])
        came, aborted = poll(turn, aborted)
        in_time = (now_ns() - start).below(limit_ns)
        goes_on = (came == 0) & (aborted == 0) & in_time
        scf.condition(goes_on.value, [(turn + 1).value, aborted.value, came.value])
    after = loop.after.blocks.append(i32(), i32(), i32())
    with ir.InsertionPoint.at_block_begin(after):
        scf.yield_(list(after.arguments))
    return Word(loop.results[2])


def commit_async() -> None:
    """Closes this thread's current group of `copy_async`."""
    mgpu.inline_ptx("cp.async.commit_group;", result_types=None)


def await_async(groups_left: int) -> None:
    """Waits until at most `groups_left` groups of this thread's copies are in flight.

    After a barrier of all threads that copied, the matrix unit may read the completed bytes.
    """
    mgpu.inline_ptx(f"cp.async.wait_group {groups_left};", result_types=None)
    mgpu.inline_ptx("fence.proxy.async.shared::cta;", result_types=None)
