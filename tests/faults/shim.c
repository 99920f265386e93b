/* Stops a process at a chosen system call that changes the disk.

   In: a control block shared with the process that watches. Out: the calls counted there, and one of them gone wrong;
   or, if it asks for that, all that was changed, call by call and byte by byte, in a file.
   A seccomp filter traps every such call of this process, whoever makes it: Python, torch, Rust or libc itself. The
   SIGSYS handler looks whether it is about the folder watched, and then makes the call itself, lets it fail, cuts it
   short, or ends the process. Only what is written through a shared mapping makes no call; none of our writers does so.
   Sources: seccomp(2), SECCOMP_RET_TRAP; linux/seccomp.h. x86-64 Linux only. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/fs.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <ucontext.h>
#include <unistd.h>

#ifndef __x86_64__
#error "the registers below are those of x86-64"
#endif

enum { PATH_BYTES = 512, TRACE_CALLS = 4096, SECONDS = 120 };
enum kind { NONE, KILL_BEFORE, KILL_AFTER, ONE_ENOSPC, ONE_EIO, DISK_FULL, DISK_DEAD, SHORT, SHORT_THEN_FULL };

struct call {
    char name[20];
    char path[PATH_BYTES];
    long size_bytes; /* of a write; 0 of other calls */
};

/* The same as Control in injector.py. */
struct control {
    char folder[PATH_BYTES]; /* only calls on what is in it count */
    int kind;
    long at; /* number of the call to stop at, from 0 */
    int no_exchange, no_locks; /* be a file system that cannot do these */
    int orders, answers; /* descriptors for serve(); 0 and 0 to run straight on */
    int log; /* descriptor of the file to note all changes in; 0 for none */
    int logging; /* whether a thread is just making a change and its note, which all others wait for */
    long counted;
    int done; /* whether the fault has happened */
    struct call calls[TRACE_CALLS];
};

/* A change, as read by injector.py; the bytes written to a file follow. */
struct note {
    char name[20];
    int flags; /* of open, rename and unlink */
    long inode, mode, size_bytes; /* of what was changed, afterwards */
    long offset, length; /* of the bytes that follow */
    char paths[2][PATH_BYTES];
};

static struct control *control;
static int served; /* whether this is a process that serve() has forked */

/* Where a call names what it changes: F a descriptor, P a path, D a descriptor and a path relative to it; . is skipped.
   Two of them where it has two. */
struct watched {
    long number;
    const char *name, *places;
    char needs_space; /* whether a full disk refuses it */
};

static const struct watched watched[] = {
    {SYS_open, "open", "P", 1},
    {SYS_openat, "openat", "D", 1},
    {SYS_creat, "creat", "P", 1},
    {SYS_write, "write", "F", 1},
    {SYS_pwrite64, "pwrite64", "F", 1},
    {SYS_writev, "writev", "F", 1},
    {SYS_pwritev, "pwritev", "F", 1},
    {SYS_pwritev2, "pwritev2", "F", 1},
    {SYS_sendfile, "sendfile", "F", 1},
    {SYS_copy_file_range, "copy_file_range", "..F", 1},
    {SYS_splice, "splice", "..F", 1},
    {SYS_ioctl, "ioctl", "F", 1}, /* FICLONE and FICLONERANGE */
    {SYS_fallocate, "fallocate", "F", 1},
    {SYS_truncate, "truncate", "P", 0},
    {SYS_ftruncate, "ftruncate", "F", 0},
    {SYS_mkdir, "mkdir", "P", 1},
    {SYS_mkdirat, "mkdirat", "D", 1},
    {SYS_mknod, "mknod", "P", 1},
    {SYS_mknodat, "mknodat", "D", 1},
    {SYS_link, "link", "PP", 1},
    {SYS_linkat, "linkat", "DD", 1},
    {SYS_symlink, "symlink", ".P", 1},
    {SYS_symlinkat, "symlinkat", ".D", 1},
    {SYS_rename, "rename", "PP", 0},
    {SYS_renameat, "renameat", "DD", 0},
    {SYS_renameat2, "renameat2", "DD", 0},
    {SYS_unlink, "unlink", "P", 0},
    {SYS_unlinkat, "unlinkat", "D", 0},
    {SYS_rmdir, "rmdir", "P", 0},
    {SYS_fsync, "fsync", "F", 0},
    {SYS_fdatasync, "fdatasync", "F", 0},
    {SYS_syncfs, "syncfs", "F", 0},
    {SYS_sync_file_range, "sync_file_range", "F", 0},
    {SYS_chmod, "chmod", "P", 0},
    {SYS_fchmod, "fchmod", "F", 0},
    {SYS_fchmodat, "fchmodat", "D", 0},
    {SYS_chown, "chown", "P", 0},
    {SYS_lchown, "lchown", "P", 0},
    {SYS_fchown, "fchown", "F", 0},
    {SYS_fchownat, "fchownat", "D", 0},
    {SYS_utime, "utime", "P", 0},
    {SYS_utimes, "utimes", "P", 0},
    {SYS_futimesat, "futimesat", "D", 0},
    {SYS_utimensat, "utimensat", "D", 0},
    {SYS_setxattr, "setxattr", "P", 1},
    {SYS_lsetxattr, "lsetxattr", "P", 1},
    {SYS_fsetxattr, "fsetxattr", "F", 1},
    {SYS_removexattr, "removexattr", "P", 0},
    {SYS_lremovexattr, "lremovexattr", "P", 0},
    {SYS_fremovexattr, "fremovexattr", "F", 0},
    {SYS_flock, "flock", "", 0},
};
enum { WATCHED = sizeof watched / sizeof *watched };

static const int OPENS_TO_CHANGE = O_WRONLY | O_RDWR | O_CREAT | O_TRUNC;

/* The one place from which the filter lets calls through: raw_call(number, arguments). */
long raw_call(long number, const long *arguments);
extern char raw_call_end[];
__asm__(".text\n"
        ".globl raw_call, raw_call_end\n"
        ".type raw_call, @function\n"
        "raw_call:\n"
        "  mov %rdi, %rax\n"
        "  mov %rsi, %r11\n"
        "  mov 0(%r11), %rdi\n"
        "  mov 8(%r11), %rsi\n"
        "  mov 16(%r11), %rdx\n"
        "  mov 24(%r11), %r10\n"
        "  mov 32(%r11), %r8\n"
        "  mov 40(%r11), %r9\n"
        "  syscall\n"
        "raw_call_end:\n"
        "  ret\n");

static void end_process(void)
{
    raw_call(SYS_kill, (long[6]){getpid(), SIGKILL});
}

/* The path that `name` (or, if it is null, `descriptor` alone) stands for, as far as it needs no look at links. */
static void resolve(char *path, int descriptor, const char *name)
{
    char link[40];
    long length = 0;

    if (name == NULL || name[0] != '/') {
        if (descriptor == AT_FDCWD)
            strcpy(link, "/proc/self/cwd");
        else
            snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
        length = raw_call(SYS_readlink, (long[6]){(long)link, (long)path, PATH_BYTES - 1});
        if (length < 0)
            length = 0;
    }
    path[length] = 0;
    if (name != NULL && name[0] != 0)
        snprintf(path + length, PATH_BYTES - length, "%s%s", name[0] == '/' ? "" : "/", name);
}

static int is_inside(const char *path)
{
    size_t length = strlen(control->folder);
    return strncmp(path, control->folder, length) == 0 && (path[length] == '/' || path[length] == 0);
}

/* Whether the call is on something in the folder; `path` is the last place it names there, `paths` are all it names. */
static int concerns_us(const struct watched *call, const long *arguments, char *path, char (*paths)[PATH_BYTES])
{
    int found = 0;

    for (const char *letter = call->places; *letter; letter++, arguments++) {
        if (*letter == '.')
            continue;
        char *place = *paths++;
        if (*letter == 'F')
            resolve(place, (int)arguments[0], NULL);
        else if (*letter == 'P')
            resolve(place, AT_FDCWD, (const char *)arguments[0]);
        else {
            resolve(place, (int)arguments[0], (const char *)arguments[1]);
            arguments++;
        }
        if (is_inside(place)) {
            strcpy(path, place);
            found = 1;
        }
    }
    return found;
}

/* The argument that says how much a call writes; -1 where none does. */
static int length_argument(long number)
{
    switch (number) {
    case SYS_write:
    case SYS_pwrite64:
    case SYS_writev:
    case SYS_pwritev:
    case SYS_pwritev2:
        return 2;
    case SYS_sendfile:
        return 3;
    case SYS_copy_file_range:
        return 4;
    }
    return -1;
}

static int takes_vector(long number)
{
    return number == SYS_writev || number == SYS_pwritev || number == SYS_pwritev2;
}

static long size_of(long number, const long *arguments)
{
    int index = length_argument(number);
    long size_bytes = 0;

    if (index < 0 || !takes_vector(number))
        return index < 0 ? 0 : arguments[index];
    for (long i = 0; i < arguments[2]; i++)
        size_bytes += ((const struct iovec *)arguments[1])[i].iov_len;
    return size_bytes;
}

/* The call with half of its bytes. */
static long half_call(long number, const long *arguments)
{
    long half[6], left = size_of(number, arguments) / 2;
    struct iovec parts[64];

    memcpy(half, arguments, sizeof half);
    if (!takes_vector(number)) {
        half[length_argument(number)] = left;
        return raw_call(number, half);
    }
    long count = 0;
    for (; count < arguments[2] && count < 64 && left > 0; count++) {
        parts[count] = ((const struct iovec *)arguments[1])[count];
        if ((long)parts[count].iov_len > left)
            parts[count].iov_len = left;
        left -= parts[count].iov_len;
    }
    half[1] = (long)parts;
    half[2] = count;
    return raw_call(number, half);
}

static int needs_space(const struct watched *call, const long *arguments)
{
    if (call->number == SYS_open)
        return (arguments[1] & O_CREAT) != 0;
    if (call->number == SYS_openat)
        return (arguments[2] & O_CREAT) != 0;
    return call->needs_space;
}

/* At the first call that counts: from here on be the parent of many processes that go on from here, one for each order
   read. What comes before that call changes no disk, so it is the same for all of them and need not be done anew. */
static void serve(void)
{
    struct stat tasks;
    long order[2]; /* kind, at */
    int status;

    if (stat("/proc/self/task", &tasks) != 0 || tasks.st_nlink != 3)
        _exit(1); /* other threads would not be there in the children */
    while (read(control->orders, order, sizeof order) == sizeof order) {
        long child = syscall(SYS_fork);
        if (child == 0) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            alarm(SECONDS);
            control->kind = (int)order[0];
            control->at = order[1];
            served = 1;
            return;
        }
        if (child < 0 || waitpid((pid_t)child, &status, 0) != child)
            break;
        raw_call(SYS_write, (long[6]){control->answers, (long)&status, sizeof status});
    }
    _exit(0);
}

/* Where in its file a call has written `length` bytes; -1 if it writes none. */
static long place_written(long number, const long *arguments, long length)
{
    const long *position = NULL;

    switch (number) {
    case SYS_pwrite64:
    case SYS_pwritev:
        return arguments[3];
    case SYS_copy_file_range:
    case SYS_splice:
        position = (const long *)arguments[3];
        return (position ? *position : lseek((int)arguments[2], 0, SEEK_CUR)) - length;
    case SYS_write:
    case SYS_writev:
    case SYS_pwritev2:
    case SYS_sendfile:
        return lseek((int)arguments[0], 0, SEEK_CUR) - length;
    case SYS_ioctl:
        return 0;
    }
    return -1;
}

/* What a call has changed, and what is there now. */
static void take_note(const struct watched *call, const long *arguments, long result, char (*paths)[PATH_BYTES])
{
    static char block[1 << 16];
    struct note note = {.offset = -1};
    struct stat found = {0};
    char place[40];
    long number = call->number, left;
    int descriptor = (int)arguments[number == SYS_copy_file_range || number == SYS_splice ? 2 : 0];

    strcpy(note.name, call->name);
    memcpy(note.paths, paths, sizeof note.paths);
    if (number == SYS_open || number == SYS_openat || number == SYS_creat) {
        descriptor = (int)result;
        note.flags = number == SYS_creat ? O_TRUNC : (int)arguments[number == SYS_open ? 1 : 2];
    } else if (number == SYS_renameat2)
        note.flags = (int)arguments[4];
    else if (number == SYS_unlinkat || number == SYS_fallocate)
        note.flags = (int)arguments[number == SYS_unlinkat ? 2 : 1];
    if (strchr(call->places, 'F') || number == SYS_open || number == SYS_openat || number == SYS_creat)
        fstat(descriptor, &found);
    else
        lstat(paths[1][0] ? paths[1] : paths[0], &found);
    note.inode = (long)found.st_ino;
    note.mode = found.st_mode;
    note.size_bytes = found.st_size;
    if (S_ISREG(found.st_mode)) {
        note.offset = place_written(number, arguments, result);
        note.length = number == SYS_ioctl ? note.size_bytes : note.offset < 0 ? 0 : result;
    }
    raw_call(SYS_write, (long[6]){control->log, (long)&note, sizeof note});
    if (note.length == 0)
        return;
    snprintf(place, sizeof place, "/proc/self/fd/%d", descriptor); /* it may be open for writing only */
    int file = (int)raw_call(SYS_open, (long[6]){(long)place, O_RDONLY});
    for (left = note.length; left > 0;) {
        long count = pread(file, block, left < (long)sizeof block ? left : (long)sizeof block,
                           note.offset + note.length - left);
        if (count <= 0)
            end_process(); /* what is noted must be what is there */
        raw_call(SYS_write, (long[6]){control->log, (long)block, count});
        left -= count;
    }
    close(file);
}

/* The call as it was meant, and a note of it if it changes the folder, or says something. */
static long noted_call(const struct watched *call, const long *arguments)
{
    char path[PATH_BYTES], paths[2][PATH_BYTES] = {"", ""};
    long number = call->number, result;
    int says = number == SYS_write && arguments[0] == STDOUT_FILENO;

    if (!concerns_us(call, arguments, path, paths) && !says)
        return raw_call(number, arguments);
    while (__atomic_exchange_n(&control->logging, 1, __ATOMIC_ACQUIRE))
        sched_yield();
    result = number == SYS_fsync || number == SYS_fdatasync ? 0 : raw_call(number, arguments);
    if (result >= 0)
        take_note(call, arguments, result, paths);
    __atomic_store_n(&control->logging, 0, __ATOMIC_RELEASE);
    return result;
}

/* The call as it was meant; but waiting for the disk is left out, since a process that ends loses nothing that it has
   written, and nearly all of the time would go there. */
static long do_call(long number, const long *arguments)
{
    if (number == SYS_fsync || number == SYS_fdatasync || number == SYS_syncfs || number == SYS_sync_file_range)
        return 0;
    return raw_call(number, arguments);
}

static long answer(long number, const long *arguments)
{
    const struct watched *call = watched;
    char path[PATH_BYTES], paths[2][PATH_BYTES];

    while (call->number != number)
        call++;
    if (number == SYS_flock)
        return control->no_locks ? -ENOLCK : raw_call(number, arguments);
    if (number == SYS_renameat2 && arguments[4] && control->no_exchange)
        return -EINVAL;
    if (control->log)
        return noted_call(call, arguments);
    if (!concerns_us(call, arguments, path, paths))
        return raw_call(number, arguments);

    if (control->orders && !served)
        serve();
    long size_bytes = size_of(number, arguments);
    long index = __atomic_fetch_add(&control->counted, 1, __ATOMIC_SEQ_CST);
    if (index < TRACE_CALLS) {
        struct call *noted = &control->calls[index];
        strcpy(noted->name, call->name);
        strcpy(noted->path, path);
        noted->size_bytes = size_bytes;
    }
    if (index < control->at)
        return do_call(number, arguments);
    if (index > control->at) {
        if (control->done && control->kind == DISK_DEAD)
            return -EIO;
        if (control->done && (control->kind == DISK_FULL || control->kind == SHORT_THEN_FULL))
            return needs_space(call, arguments) ? -ENOSPC : do_call(number, arguments);
        return do_call(number, arguments);
    }
    long result;
    switch (control->kind) {
    case KILL_BEFORE:
        control->done = 1;
        end_process();
        return 0;
    case KILL_AFTER:
        result = do_call(number, arguments);
        control->done = 1;
        end_process();
        return result;
    case ONE_ENOSPC:
    case DISK_FULL:
        control->done = 1;
        return -ENOSPC;
    case ONE_EIO:
    case DISK_DEAD:
        control->done = 1;
        return -EIO;
    case SHORT:
    case SHORT_THEN_FULL:
        if (size_bytes < 2)
            return do_call(number, arguments);
        result = half_call(number, arguments);
        control->done = 1;
        return result;
    }
    return do_call(number, arguments);
}

static void on_call(int signal_number, siginfo_t *info, void *context)
{
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    long arguments[6] = {registers[REG_RDI], registers[REG_RSI], registers[REG_RDX],
                         registers[REG_R10], registers[REG_R8],  registers[REG_R9]};
    int kept = errno;

    (void)signal_number;
    registers[REG_RAX] = answer(info->si_syscall, arguments);
    errno = kept;
}

#define LOAD(field) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, field))
#define UNLESS_EQUAL_SKIP(value, count) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (value), 0, (count))
#define UNLESS_BITS_SKIP(value, count) BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, (value), 0, (count))
#define ALLOW BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)
#define TRAP BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRAP)

/* Watch this process, and all threads it starts from now on; returns 0, or the error's number. */
int inject(struct control *shared)
{
    struct sock_filter filter[16 + 6 * WATCHED];
    struct sock_filter *next = filter;
    unsigned long own = (unsigned long)raw_call_end;
    struct sigaction action = {.sa_sigaction = on_call, .sa_flags = SA_SIGINFO | SA_NODEFER | SA_RESTART};

    control = shared;
    if (sigaction(SIGSYS, &action, NULL) != 0)
        return errno;

#define ADD(...)                                                                                                       \
    do {                                                                                                               \
        const struct sock_filter added[] = {__VA_ARGS__};                                                              \
        memcpy(next, added, sizeof added);                                                                             \
        next += sizeof added / sizeof *added;                                                                          \
    } while (0)
    ADD(LOAD(arch), UNLESS_EQUAL_SKIP(AUDIT_ARCH_X86_64, 4));
    ADD(LOAD(instruction_pointer), UNLESS_EQUAL_SKIP((unsigned)own, 3));
    ADD(BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, instruction_pointer) + 4));
    ADD(UNLESS_EQUAL_SKIP((unsigned)(own >> 32), 1), ALLOW);
    ADD(LOAD(nr));
    for (int i = 0; i < WATCHED; i++) {
        long number = watched[i].number;
        if (number == SYS_open || number == SYS_openat) {
            ADD(UNLESS_EQUAL_SKIP((unsigned)number, 4));
            if (number == SYS_open)
                ADD(LOAD(args[1]));
            else
                ADD(LOAD(args[2]));
            ADD(UNLESS_BITS_SKIP((unsigned)OPENS_TO_CHANGE, 1), TRAP, ALLOW);
        } else if (number == SYS_ioctl) {
            ADD(UNLESS_EQUAL_SKIP((unsigned)number, 6), LOAD(args[1]));
            ADD(UNLESS_EQUAL_SKIP((unsigned)FICLONE, 1), TRAP, UNLESS_EQUAL_SKIP((unsigned)FICLONERANGE, 1), TRAP);
            ADD(ALLOW);
        } else
            ADD(UNLESS_EQUAL_SKIP((unsigned)number, 1), TRAP);
    }
    ADD(ALLOW);

    struct sock_fprog program = {.len = (unsigned short)(next - filter), .filter = filter};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0)
        return errno;
    if (syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program) != 0)
        return errno;
    return 0;
}
