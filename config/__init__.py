"""The config files, installed as the package ``fusion_bench_intervmerge_config``."""
