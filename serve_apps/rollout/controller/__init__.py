"""The controller: a process that looks at the counts of each rollout with a policy, and does what the verdict says.

`decisions` is pure. `controller` reads the ledger and the evidence, and appends. `leadership` lets one controller of
several nodes act. `service` is the process. State is the ledger: a killed controller loses nothing.
"""
