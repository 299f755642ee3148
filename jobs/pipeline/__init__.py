"""The demo: the whole loop from raw data to a report. Each stage is a command line that can be run again by hand."""
