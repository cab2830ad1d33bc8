"""Everything this package raises on purpose."""


class SSDTorchRecError(Exception):
    """Root: catch this to catch all of ours and nothing else."""


class ConfigError(SSDTorchRecError, ValueError):
    """A configuration contradicts itself or its surroundings."""


class DataError(SSDTorchRecError, ValueError):
    """A data set, a file of it, or a value in it is not what it must be."""


class JaggedLayoutError(SSDTorchRecError, ValueError):
    """Lengths are no row lengths, or events are not the ones a layout cuts."""


class ShapeError(SSDTorchRecError, ValueError):
    """Tensors handed to an operator do not fit each other."""


class DtypeError(SSDTorchRecError, TypeError):
    """A tensor handed to an operator is of a dtype, or on a device, that it does not take."""


class CheckpointError(SSDTorchRecError, RuntimeError):
    """A checkpoint is cut short, edited, or belongs to another model, vocabulary or optimizer."""


class DivergedError(SSDTorchRecError, ArithmeticError):
    """The loss stopped being finite on at least one rank."""


class LostRankError(SSDTorchRecError, RuntimeError):
    """Ranks waited for another one that does not answer."""


class Interrupted(SSDTorchRecError, RuntimeError):
    """A run was asked to stop; it saved and can be resumed."""


class DoubleBackwardError(SSDTorchRecError, RuntimeError):
    """A kernel's gradient was to be differentiated again."""
