"""What a team declares about its features: plain objects, nothing that reads or writes."""
