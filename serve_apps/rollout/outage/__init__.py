"""What a machine does for its rollouts while the ledger does not answer: a rollback for safety, and nothing else.

`known` has the rollouts that ran when the ledger answered last. `local_evidence` counts the edge's own access records.
`watch` finds harm and writes a rollback to the `journal`, a file that the edge of this machine follows. `settling`
appends it to the ledger when the ledger is back.

This is the one exception to "the ledger is the only source of truth" (decision 0077). The edge imports `journal`, so
that module needs neither NumPy nor SciPy.
"""
