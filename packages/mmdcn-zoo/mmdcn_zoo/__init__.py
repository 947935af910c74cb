# SPDX-License-Identifier: Apache-2.0
"""The checkpoints of mmdcn's model zoo; `mmdcn.zoo` finds them here by name."""
