# SPDX-License-Identifier: Apache-2.0
"""What pyseq is measured with; ``python -m benchmarks.report`` measures all of it."""
