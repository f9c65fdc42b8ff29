"""Train EfficientDet on COCO or on your own images: the loop of yolo-v3/main.py with the defaults of args.yaml here.

python3 efficientdet/main.py data.root=data/coco                            EfficientDet-D0 for 300 epochs
python3 efficientdet/main.py --model_name efficientdet-d3 data.root=FOLDER  another size, or retinanet
python3 efficientdet/main.py --resume logs/240224-211713_efficientdet       resume exactly where the run stopped
torchrun --nproc_per_node=8 efficientdet/main.py --mode train --train_batch_size 8 --model_dir runs/d0
python3 efficientdet/main.py --mode eval --model_dir runs/d0                evaluates its checkpoints meanwhile

Settings are those of yolo-v3/args.yaml. The flags of the TensorFlow EfficientDet for Habana are aliases of settings, or
say what answers them: docs/efficientdet_commands.md. Writes a run directory as yolo-v3/main.py does.
"""

import runpy
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent

if __name__ == "__main__":
    sys.argv[1:1] = ["--experiment", str(HERE)]
    runpy.run_path(str(HERE.parent / "yolo-v3" / "main.py"), run_name="__main__")
