"""Replicas for the next step of a rollout: what the controller asks for, and what Serve has.

The controller appends `ReplicasRequested`. Each replica of that version reads it (`requested`), and reports the number
to Serve, whose autoscaling policy never goes below it (`serve_apps/replica/scaling.py`). `serve` reads how many
replicas are ready. `scaling` holds up a step until there are enough.
"""
