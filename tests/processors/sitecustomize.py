"""Run by Python when it starts with this folder on its path: processes that tests start find the packages, too."""

import processor_packages

processor_packages.install()
