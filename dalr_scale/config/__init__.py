"""The configuration of a run: schema, presets, limits; how it is read and written."""

from dalr_scale.config.loading import (
    DEFAULT_RECIPE,
    RECIPES,
    build_config,
    load_config,
    parse_overrides,
    recipe_names,
)
from dalr_scale.config.schema import (
    BatchConfig,
    Config,
    DataConfig,
    EngineConfig,
    EvalConfig,
    LogConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    RunConfig,
    SaveConfig,
    TeachersConfig,
    new_encoder_pooler,
)

__all__ = [
    "DEFAULT_RECIPE",
    "RECIPES",
    "BatchConfig",
    "Config",
    "DataConfig",
    "EngineConfig",
    "EvalConfig",
    "LogConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "RunConfig",
    "SaveConfig",
    "TeachersConfig",
    "build_config",
    "load_config",
    "new_encoder_pooler",
    "parse_overrides",
    "recipe_names",
]
