"""What tests share, and the processes that they start."""

import functools

import accelerate.utils.imports

# Accelerate reads metadata from disk whenever it asks for a package, several times a microbatch
accelerate.utils.imports._is_package_available = functools.cache(accelerate.utils.imports._is_package_available)
