"""Training that wins back what quantization has lost, with the model itself as the teacher."""

from hasten.search.finetune.recover import FineTuned, finetune

__all__ = ["FineTuned", "finetune"]
