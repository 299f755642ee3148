"""The loop of the controller's process: take the lock, look at all rollouts each second, and outlive every failure."""

from __future__ import annotations

import logging
import threading

import sqlalchemy as sa

from cluster.errors import FalajError, RefusedError, first_line
from serve_apps.rollout.controller.controller import Controller
from serve_apps.rollout.controller.leadership import Leadership
from serve_apps.rollout.controller.metrics import ControllerMetrics
from serve_apps.rollout.outage.watch import OutageWatch
from serve_apps.rollout.transitions import ACTOR

EVERY_S = 1.0
LOG = logging.getLogger("falaj.rollouts")


def look_until_stopped(
    controller: Controller,
    leadership: Leadership,
    metrics: ControllerMetrics,
    stopped: threading.Event,
    watch: OutageWatch,
) -> None:
    """Look at all rollouts each second while this controller has the lock; then release the lock.

    What this machine has journaled comes first, also if another controller acts.
    """
    acts = False
    while not stopped.wait(EVERY_S):
        try:
            watch.begin_look(controller.ledger, actor=ACTOR)
            held = leadership.is_held()
            if held is not acts:
                LOG.info("this controller %s", "acts" if held else "waits: another one acts")
            acts = held
            metrics.acts.set(acts)
            metrics.not_judged.set(controller.check_once() if acts else 0)
            watch.end_look()
            metrics.last_check.set_to_current_time()
        except (sa.exc.SQLAlchemyError, FalajError, RefusedError, OSError) as error:
            metrics.acts.set(0)
            LOG.warning("the rollouts could not be read: %s", first_line(error))
        except Exception:  # without the loop, no guardrail would roll back
            metrics.acts.set(0)
            LOG.exception("the rollouts could not be looked at")
    leadership.release()
