# SPDX-License-Identifier: Apache-2.0
"""Sets of experiments with several seeds each: their runs, results, tables and plots."""
