"""The cache of shrunk images that --cache names."""

from dataclasses import replace
from pathlib import Path

from commands.pretraining_settings import PretrainingSettings
from commands.tokenizer_settings import TokenizerSettings
from data.augmentations import Views
from data.cache import CacheFormat, cache_images
from data.splits import PretrainingSplits

_Settings = PretrainingSettings | TokenizerSettings


def describe_cache(settings: _Settings, views: Views) -> list[str]:
    """Return the line of the plan about the cache, if there is one."""
    if settings.cache is None:
        return []
    form = _format(settings, views)
    return [f"cache: {settings.cache}, {form.encoding} images of {form.shortest_side} px on the shortest side"]


def with_cache(settings: _Settings, views: Views, splits: PretrainingSplits) -> PretrainingSplits:
    """Return the splits with their images in the cache, if there is one; writes those that it does not have yet.

    Every process calls this by itself: the others wait for the lock of the one that writes, which may take hours, and
    not in a collective operation, which times out. A dry run writes nothing and times steps without the cache.
    """
    if settings.cache is None or settings.dry_run:
        return splits
    both = [splits.train, splits.validation]
    train, validation = cache_images(both, Path(settings.cache), _format(settings, views))
    return replace(splits, train=train, validation=validation)


def _format(settings: _Settings, views: Views) -> CacheFormat:
    side = settings.cache_size or views.shortest_side
    return CacheFormat(side, settings.num_channels, settings.cache_format)
