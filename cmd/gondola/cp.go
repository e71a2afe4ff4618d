package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/gondola-vmm/gondola/guestagent"
	"github.com/gondola-vmm/gondola/guestagent/proto"
	"github.com/gondola-vmm/gondola/vmm/control"
)

func cpCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "cp SRC DST",
		Short: "Copy files into and out of a running machine",
		Long: `Copy a file, or a directory with all that is in it, between the host and a
running machine. One of SRC and DST is NAME:PATH, a path in the guest of the
machine NAME, from its root directory; the other is a path on the host, or - for
standard input or output. If DST is a directory, or ends in a slash, SRC is copied
into it. Permissions and symbolic links are kept.`,
		Example: `  gondola cp ./prog dev:/usr/bin/
  gondola cp dev:/var/log ./log
  gondola cp dev:/etc/passwd -`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 2 {
				return usageError{errors.New("gondola cp takes SRC and DST")}
			}
			return nil
		},
		ValidArgsFunction: func(cmd *cobra.Command, args []string, word string) ([]string, cobra.ShellCompDirective) {
			names, _ := completeMachines(cmd, nil, word)
			for i := range names {
				names[i] += ":"
			}
			return names, cobra.ShellCompDirectiveNoSpace
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
			defer stop()
			return cp(ctx, args[0], args[1], cmd.InOrStdin(), cmd.OutOrStdout())
		},
	}
}

// splitPath splits NAME:PATH. A host's path that looks like one can be written
// with ./ in front.
func splitPath(s string) (name, file string, guest bool) {
	name, file, ok := strings.Cut(s, ":")
	if !ok || control.CheckName(name) != nil {
		return "", s, false
	}
	return name, file, true
}

func cp(ctx context.Context, src, dst string, stdin io.Reader, stdout io.Writer) error {
	srcName, srcPath, fromGuest := splitPath(src)
	dstName, dstPath, toGuest := splitPath(dst)
	switch {
	case fromGuest == toGuest:
		return usageError{fmt.Errorf("gondola cp %s %s: one of both, not more, is NAME:PATH in a machine", src, dst)}
	case srcPath == "" || dstPath == "":
		return usageError{fmt.Errorf("gondola cp %s %s: a path is missing", src, dst)}
	}
	c, err := dial(ctx, srcName+dstName)
	if err != nil {
		return err
	}
	defer c.Close()
	if toGuest {
		return copyIn(ctx, c.Client, srcPath, dstPath, stdin)
	}
	return copyOut(ctx, c.Client, srcPath, dstPath, stdout)
}

// guestPath is a path in a guest from its root directory.
func guestPath(p string) string { return path.Join("/", p) }

func copyIn(ctx context.Context, c *guestagent.Client, src, dst string, stdin io.Reader) error {
	into := strings.HasSuffix(dst, "/")
	dst = guestPath(dst)
	if src == "-" {
		if into {
			return usageError{fmt.Errorf("%s/: standard input has no name: give it one", dst)}
		}
		return c.Put(ctx, dst, 0o644, stdin)
	}
	if !into {
		// "." exists in directories only, and costs no more than their list.
		// What else is wrong, the copy will say.
		info, _ := c.Get(ctx, dst+"/.", io.Discard)
		into = info.Mode&proto.ModeType == proto.ModeDir
	}
	if into {
		abs, err := filepath.Abs(src)
		if err != nil {
			return err
		}
		dst = path.Join(dst, filepath.Base(abs))
	}
	return c.CopyTo(ctx, src, dst)
}

func copyOut(ctx context.Context, c *guestagent.Client, src, dst string, stdout io.Writer) error {
	src = guestPath(src)
	if dst == "-" {
		_, err := c.Get(ctx, src, stdout)
		return err
	}
	if fi, err := os.Stat(dst); err == nil && fi.IsDir() || strings.HasSuffix(dst, "/") {
		dst = filepath.Join(dst, path.Base(src))
	}
	return c.CopyFrom(ctx, src, dst)
}
