"""Another rival of `wsurg apply-adapter`: axolotl's merge, one file of the model at a time.

Usage: python axolotl_merge.py BASE ADAPTER OUT, with a Python that has axolotl
"""

import sys

from axolotl.cli.utils.lora_merge import merge_lora_sharded_efficient

base, adapter, out = sys.argv[1:]
merge_lora_sharded_efficient(base, adapter, out, device="cpu")
