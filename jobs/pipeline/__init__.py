"""The demo: the whole loop from raw data to report, each stage a command line that anybody can run again."""
