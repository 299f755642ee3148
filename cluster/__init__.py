"""The ground every Falaj process stands on; imports none of the other packages."""
