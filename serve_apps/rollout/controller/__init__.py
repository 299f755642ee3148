"""The controller: a process that looks at the counts of each rollout with a policy, and does what the verdict says.

`decisions` is pure. `controller` reads ledger and counts, and appends. `leadership` lets one controller of several
machines act, in the loop of `looking`. `outcomes` reads the logs for metrics. `operations` and `http` are for callers.
`watching` judges a promotion, `ending` ends applications, `steady_state` follows monitoring, `summary` sums up a
rollout, and `delivering` sends that to the webhook. `service` is the process. State is the ledger: a killed controller
loses nothing.
"""
