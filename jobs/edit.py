"""The edit job for ``ray job submit``: the same arguments as ``diffedit-ray edit``.

ray job submit --working-dir . -- python jobs/edit.py s3://bucket/manifest.parquet s3://bucket/out --model my/model
"""

import sys

from diffedit_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["edit", *sys.argv[1:]]))
