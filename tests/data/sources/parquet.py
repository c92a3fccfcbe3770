"""Parquet files for the tests."""


def write_parquet(folder, **parts):
    """A folder with one Parquet file of each dataset, by the name of its split."""
    folder.mkdir(exist_ok=True)
    for name, part in parts.items():
        part.to_parquet(str(folder / f"{name}-00000-of-00001.parquet"))
    return folder
