"""Evidence of a rollout: what the access records and the logs of predictions and outcomes say about its two arms.

Who does what:

- **Each edge's controller process** runs a thread (`collecting.Collector`) with two passes a second. It reads the
  edge's own access files from the stored position on, and writes counts and position in one transaction of the
  ledger's database, or with SQLite of a file beside it (`database.py`). Nobody else has to call it.
- **The process that decides** calls, for a rollout with a policy:

      from serve_apps.rollout.evidence.store import Counting, EvidenceStore

      store = EvidenceStore(ledger.engine)
      store.register(rollout_id, Counting(slow_ms=…, max_units=…))   # once, before the event that starts the rollout
      evidence = store.evidence(rollout_id, plan, step=…, step_started_at=…, started_at=…, now=…)   # each second
      store.forget(rollout_id)                          # after the rollout's end, until it returns False

  The requests after a promotion with a holdback have an id of their own, `watch_id(rollout_id)`. The controller
  registers it at its looks at the rollout, so before the promotion, with `ensure_registered(…, is_new=True)`.

  For metrics of predictions and outcomes, it also needs the keys of the model's logs, and calls every few seconds:

      from serve_apps.rollout.evidence.outcomes import OutcomeReader, RolloutMetrics

      reader = OutcomeReader(ledger, places, key_store(actor.access), signatures=…, metrics=RolloutMetrics(…))
      while reader.collect(now=…): ...   # adds the cohorts of units whose outcome window is over

  `evidence` then has what was added. If nobody calls it, `Evidence.metrics` is empty, so no goal is reached.

  `evidence` takes some milliseconds, and stores what it returns for `last_look`. Times are aware `datetime` values in
  UTC; `step_started_at` and `started_at` are the times of the ledger's events. `now` is the time of the look.

Rules that a caller must keep:

- A step is recognised by its weight: each access record has the split's bound (`below`) by which it was assigned.
  So the weights of a rollout's steps must increase, as `Policy` requires.
- Windows: number `step + whole days since started_at`, at most `plan.num_windows - 1`. A day begins at a multiple of
  24 h after `started_at`. `cluster.statistics.planning` counts windows in the same way.
- Only registered rollouts are counted by units. The last requests, and the number of requests by arm, are there for
  every rollout.

The package itself imports nothing, because the edge needs neither NumPy nor SciPy.
"""
