"Build from settings.ini, so that name, version and requirements are written down once."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser()
config.read(here / 'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']
bench = cfg['bench_requirements'].split()
ray = cfg['ray_requirements'].split()
kinds = ('json', 'csv', 'safetensors', 'html', 'css', 'js', 'jpg')

setup(
    version=cfg['version'],
    description=cfg['description'],
    author=cfg['author'],
    keywords=cfg['keywords'].split(),
    long_description=(here / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    install_requires=cfg['requirements'].split(),
    extras_require={
        'bench': bench,
        'ray': ray,
        'dev': cfg['dev_requirements'].split() + bench + ray,
    },
    packages=find_packages(include=['lora_recycle', 'lora_recycle.*']),
    zip_safe=False,
    package_data={'lora_recycle': [f'assets/**/*.{kind}' for kind in kinds]},
)
