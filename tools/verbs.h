/* SPDX-License-Identifier: BSD-2-Clause */
#ifndef SPACEWEAVE_VERBS_H
#define SPACEWEAVE_VERBS_H

/* The verbs of spaceweave(8), one file each, and what they share. */

#include "meta/meta.h"

/* Each is a main(): argv[0] is the verb. Returns an exit status. */
int verb_umount(int argc, char **argv);
int verb_info(int argc, char **argv);
int verb_map(int argc, char **argv);
int verb_undo(int argc, char **argv);
int verb_scrub(int argc, char **argv);

/*
 * Where a volume is mounted: `source` is the image as it was given to
 * mount.spaceweave, `target` the directory, from /. Both the caller's to free.
 */
struct mount_entry {
	char *source;
	char *target;
};

/*
 * Find the Spaceweave mount whose directory is `path`, or whose image is `path`.
 * -ENOENT when there is none. Of what is named by its directory no daemon is asked.
 */
int mount_find(const char *path, struct mount_entry *out);
/*
 * The path from / of its image, the caller's to free. Where the source does not
 * tell, its daemon is asked: -ETIMEDOUT if it has not answered in so many seconds
 * (0: for ever), -ENOTCONN if it is dead or does not serve us.
 */
int mount_image(const struct mount_entry *m, unsigned seconds, char **image);
void mount_free(struct mount_entry *m);

/*
 * A volume to look at: the image `path`, or the one mounted at `path`. `v` is
 * opened read-only; when somebody holds the image (`live`) it is opened
 * without a lock and shows the last checkpoint and what the journal adds.
 * Failures are reported. close_view() ends it.
 */
struct view {
	struct image *im;
	struct volume *v;
	char *image;
	char *dir;		/* where it is mounted, or NULL */
	bool live;
};
int view_open(const char *path, struct view *out);
/* The image of `path`, and where it is mounted, or NULL; both the caller's to
 * free. Failures are reported. */
int view_find(const char *path, char **image, char **dir);
void view_close(struct view *w);

/*
 * The same image, read past the host's cache where that is possible, and not to be
 * changed. `under` is a file image; the new one closes it.
 */
int image_direct(struct image *under, struct image **out);

#endif
