"""Training that wins back what quantization has lost, with the model itself as the teacher."""

from hasten.search.finetune.learning import Training
from hasten.search.finetune.recover import FineTuned, finetune, install

__all__ = ["FineTuned", "Training", "finetune", "install"]
