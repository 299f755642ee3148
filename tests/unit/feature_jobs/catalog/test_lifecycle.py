"""A deprecated view logs a warning, and a retired view is refused for new rows and training sets."""

from __future__ import annotations

import pytest

from cluster.errors import ViewRetired
from cluster.ledger import Ledger
from cluster.ledger.events import FeatureViewStateChanged
from feature_jobs.retire import RetireConfig
from feature_jobs.store.catalog.lifecycle import ViewState, read_lifecycles, require_not_retired
from feature_jobs.store.catalog.plan import make_plan, plan_lines
from feature_jobs.store.catalog.recorded import read_recorded
from feature_jobs.store.catalog.specifications import apply
from tests.projects.views import define, make_view


def change(ledger: Ledger, view: str, state: ViewState) -> None:
    event = FeatureViewStateChanged(view=view, state=state, previous="active", reason="Use 'wealth'.")
    ledger.append(event, actor="user:test")


def test_last_change_counts(ledger: Ledger) -> None:
    """A view can be deprecated, retired and restored."""
    for state in (ViewState.deprecated, ViewState.retired):
        change(ledger, "income", state)
        assert read_lifecycles(ledger)["income"].state is state
    change(ledger, "income", ViewState.active)
    assert read_lifecycles(ledger) == {}


def test_deprecated_view_warns_and_retired_view_is_refused(
    ledger: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    """Both messages have the reason. Other views are not affected."""
    change(ledger, "old", ViewState.deprecated)
    change(ledger, "gone", ViewState.retired)
    lifecycles = read_lifecycles(ledger)
    require_not_retired(lifecycles, ["income"], doing="")
    assert caplog.text == ""
    require_not_retired(lifecycles, ["income", "old"], doing="")
    assert "View 'old' is deprecated since" in caplog.text
    assert "Use 'wealth'." in caplog.text
    with pytest.raises(ViewRetired, match=r"'gone' is retired .* Use 'wealth'\. No rows\..*restore=true"):
        require_not_retired(lifecycles, ["gone"], doing="No rows.")


def test_plan_shows_lifecycle_and_how_to_retire_a_removed_view(ledger: Ledger) -> None:
    """A view that its module does not define any more stays active until it is retired."""
    views = [make_view(name) for name in ("income", "left", "ended")]
    apply(define(*views, module="shop"), ledger, actor="user:test")
    change(ledger, "income", ViewState.deprecated)
    change(ledger, "ended", ViewState.retired)
    module = define(views[0], module="shop")
    text = "\n".join(plan_lines(make_plan(module, read_recorded(ledger), read_lifecycles(ledger))))
    assert "! View 'income' is deprecated" in text
    assert "! View 'ended' is retired" in text
    assert "feature_jobs.retire view=left" in text
    assert "feature_jobs.retire view=ended" not in text


def test_a_view_cannot_be_deprecated_and_restored_at_once() -> None:
    """The command sets one state."""
    with pytest.raises(ValueError, match="exclude each other"):
        RetireConfig(view="v", reason="r", deprecate=True, restore=True)
    assert RetireConfig(view="v", reason="r").state is ViewState.retired
