"""One stage: its command line, what it reads and writes, what its result must satisfy, and its job."""
