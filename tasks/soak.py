"""The soak: the watch over a version that has become stable. All of it is on record, so that any process can go on with it."""

from __future__ import annotations

from typing import Any

from registry import orders, promotions
from registry.commands import Given
from tasks import judgement, observation
from tasks.judgement import Judgement
from tasks.promoting import Ended, Promoting, Stint
from tasks.slices import Parts

KEEP_SECONDS = 5.0
"""How often the watch is put on record: so much of it is watched again after a kill."""

LONGEST_GAP_SECONDS = 5.0
"""What one look adds to the watch at most."""


class Soak:
    """The watch of one promotion in this process, from where the carrier before left it."""

    def __init__(self, work: Promoting) -> None:
        self.work = work
        kept = work.operation.progress["soak"]
        seconds = float(kept.get("watched_seconds", 0.0))
        self._stint = Stint(
            work.monotonic,
            judged=seconds,
            total=float(kept.get("looked_seconds", seconds)),
            most=max(LONGEST_GAP_SECONDS, 2 * work.poll_seconds),
        )
        dwell = work.policy.dwell_seconds
        self._parts = Parts.of(dwell, kept["parts"]) if "parts" in kept else Parts(dwell)
        self._kept_at = self._stint.total

    def tick(self) -> Ended | None:
        """Look once, and decide. Returns how the promotion ended, None while it is still watched. Raises FencedError."""
        work, stint = self.work, self._stint
        if not work.operation.progress["soak"].get("watch", True):
            return work.end("promoted", f"{work.name} takes all of the traffic", "it was promoted without a watch")
        if work.policy.soak_seconds <= 0:
            return work.end("promoted", f"{work.name} is the stable version", "no soak was asked for")
        work.hear(stint)
        verdict = self._judged()
        if verdict.verdict == "withdraw":
            return self._end("withdrawn", f"{work.name} is withdrawn", verdict)
        if stint.advanced is not None and work.paused is None:
            title = f"{work.name} is the stable version"
            try:
                return self._end("promoted", title, verdict, taken=stint.advanced)
            except orders.OvertakenError:
                return None  # paused between the look and the end
        if verdict.verdict == "advance" and work.paused is None:
            return self._end("promoted", f"{work.name} is the stable version", verdict)
        if stint.total - self._kept_at >= KEEP_SECONDS:
            promotions.remember(work.database, work.operation, {"soak": self._kept(parts=True)})
            self._kept_at = stint.total
        return None

    def _judged(self) -> Judgement:
        work, stint = self.work, self._stint
        windows = [
            *observation.canary_windows(work.database, work.operation),
            *self._parts.look(observation.soak_window(work.database, work.operation), stint.total),
        ]
        frozen = observation.frozen_counts(work.database, work.operation, windows)
        return judgement.judge_soak(
            windows,
            frozen,
            work.policy,
            stage_seconds=stint.judged,
            streams=observation.judged_streams(work.operation, windows, frozen),
            not_judged=observation.not_judged(work.operation, windows, frozen),
        )

    def _kept(self, *, parts: bool) -> dict[str, Any]:
        kept = {
            **self.work.operation.progress["soak"],
            "watched_seconds": round(self._stint.judged, 3),
            "looked_seconds": round(self._stint.total, 3),
        }
        return {**kept, "parts": self._parts.as_dict()} if parts else kept

    def _end(self, outcome: promotions.Outcome, title: str, verdict: Judgement, *, taken: Given | None = None) -> Ended:
        return self.work.end(
            outcome,
            title,
            (f"the watch was ended by {taken}. " if taken else "") + verdict.reason,
            verdict.as_dict(),
            progress={"soak": self._kept(parts=False)},
            taken=taken,
        )


def soak(work: Promoting) -> Ended:
    """Watch the new stable version to the end; take it back where it turns out bad. Returns how the promotion ended."""
    watch = Soak(work)
    while (ended := watch.tick()) is None:
        work.rest()
    return ended
