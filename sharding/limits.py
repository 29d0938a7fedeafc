"""The most that one image file may ask for; a file over a limit is quarantined, and the build goes on.

Patches stay far below. Without limits, a few bytes can fill the memory of a worker, or keep it busy for hours.
"""

# Pixels. A false header could fill the memory.
MAX_SIDE = 16_384
MAX_PIXELS = 2**26
# Pixels of an image that Pillow decodes, which takes 11 (PNG, TIFF) to 20 (JPEG 2000) bytes of memory for each: 0.7 GB.
MAX_PILLOW_PIXELS = 2**25
# Bytes of a file: what MAX_PIXELS take as 16-bit RGBA without compression. Larger ones are not even read.
MAX_FILE_BYTES = 8 * MAX_PIXELS
# Chunks of a PNG, segments of a JPEG, strips or tiles of a TIFF. libpng writes one per 8 KB, and each costs time by itself.
MAX_CHUNKS = 2**16
# Compressed texts and profiles of a PNG: libpng inflates each of them to as much as 8 MB, and keeps up to 1000.
MAX_COMPRESSED_TEXTS = 64
# Scans of a JPEG. Encoders write 10 to 20. A decoder visits every pixel again in each, although it may take no bytes.
MAX_SCANS = 100
MAX_SCANNED_PIXELS = 16 * MAX_PIXELS
# Images that are counted in one TIFF before it is refused for them.
MAX_IMAGES = 100
# Seconds of processor time for one image, whatever it spends them on. The slowest that the other limits allow takes a third.
MAX_SECONDS = 120.0
