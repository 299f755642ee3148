"""Whether a checked batch is fit to be stored at all."""

from __future__ import annotations

from cluster.errors import BatchRefused
from feature_jobs.batch import Judged
from feature_jobs.store.definitions import FeatureView
from feature_jobs.storing import Checked


def refuse_bad_rows(view: FeatureView, checked: Checked, *, max_bad_share: float) -> None:
    """Refuse a batch with too many bad rows before any of it is written.

    Raises:
        BatchRefused: with the most frequent reason.
    """
    share = checked.rows_bad / checked.rows
    if share <= max_bad_share:
        return
    reason, count = max(checked.reasons.items(), key=lambda item: item[1])
    raise BatchRefused(
        f"View '{view.name}': {share:.1%} of {checked.rows} rows are bad, at most {max_bad_share:.1%} may be; "
        f"mostly: {reason} ({count}). Nothing was stored. Mend the source, or raise max_bad_share."
    )


def refuse_unlike(view: FeatureView, judged: Judged) -> None:
    """Refuse a batch for which a batch rule does not hold.

    Raises:
        BatchRefused: naming all of them.
    """
    if judged.findings:
        said = "; ".join(finding.said for finding in judged.findings)
        raise BatchRefused(
            f"View '{view.name}': {said}. Nothing was stored. Mend the source, or let it be with batch_rules=report."
        )
