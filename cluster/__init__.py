"""Base package of every Falaj process. It imports none of the other packages."""
