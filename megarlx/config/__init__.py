"""The configuration: sparse TOML in, every field typed and checked once, resolved JSON out."""

from megarlx.config.describe import describe
from megarlx.config.load import CHOSEN, ConfigError, as_asked, load_config
from megarlx.config.model import ModelConfig, RopeScaling, family_config
from megarlx.config.objectives import RlConfig, SftConfig
from megarlx.config.optimizer import OptimizerConfig
from megarlx.config.section import Section
from megarlx.config.sections import Config, LayoutConfig, TrainingConfig
from megarlx.config.stages import StageConfig, StageObjective

__all__ = [
    "CHOSEN",
    "Config",
    "ConfigError",
    "LayoutConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RlConfig",
    "RopeScaling",
    "Section",
    "SftConfig",
    "StageConfig",
    "StageObjective",
    "TrainingConfig",
    "as_asked",
    "describe",
    "family_config",
    "load_config",
]
