"""The demo: the pipeline `census`, then a summary and a report page of what it did."""
