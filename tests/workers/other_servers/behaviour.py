"""How a model of another server behaves, which doubles its rows: the variable BEHAVIOUR says it."""

import asyncio
import os

BEHAVIOUR = os.environ.get("BEHAVIOUR", "right")
_REQUESTS = 12  # that are answered before a server hangs
_answered = []


async def doubled(rows):
    """Return twice the rows: late, or otherwise, or never."""
    _answered.append(len(rows))
    if BEHAVIOUR == "slow":
        await asyncio.sleep(0.3)
    if BEHAVIOUR == "hung" and len(_answered) > _REQUESTS:
        await asyncio.sleep(3600)
    return 2 * rows + (BEHAVIOUR == "wrong")
