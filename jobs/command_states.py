"""How the command of a slot or of a submitted job ends. Events store these texts, so they never change."""

from __future__ import annotations

DONE, REFUSED, FAILED = "done", "refused", "failed"
"""By exit code: 0, 2, and any other."""
STOPPED = "stopped"
"""By the submitter or an admin."""
LOST, NO_RESULT = "lost", "its process ended without a result"
"""State and reason if the command had started."""
NOT_STARTED, NO_START = "not started", "the job ended before its start"
"""State and reason if the command had not started."""
