"""What people see of a run: drawings of its stages, and the report page."""
