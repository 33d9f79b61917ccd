"""A regular package: a library that installs a package `tests` must not hide this one."""
