"""Every setting, with its unit, its range and its source."""
