//go:build !lean

package initramfs

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"path/filepath"
	"runtime"

	"github.com/u-root/gobusybox/src/pkg/bb"
	"github.com/u-root/gobusybox/src/pkg/bb/findpkg"
	"github.com/u-root/gobusybox/src/pkg/golang"
	"github.com/u-root/uio/ulog"
)

// compileUroot makes one program of u-root's commands in the source tree src.
func compileUroot(ctx context.Context, src, tmp, bin string) error {
	env, err := goEnv(ctx)
	if err != nil {
		return err
	}
	packages := make([]string, len(urootCommands))
	for i, c := range urootCommands {
		packages[i] = "./cmds/core/" + c
	}
	var log bytes.Buffer
	err = bb.BuildBusybox(logger{&log}, &bb.Opts{
		Env: golang.Default(golang.DisableCGO(), golang.WithGOARCH(runtime.GOARCH), golang.WithGOROOT(env["GOROOT"]),
			golang.WithWorkingDir(src)),
		LookupEnv:    &findpkg.Env{},
		GenSrcDir:    filepath.Join(tmp, "src"),
		CommandPaths: packages,
		BinaryPath:   bin,
		GoBuildOpts:  &golang.BuildOpts{},
	})
	if err != nil {
		return fmt.Errorf("%w\n%s", err, tail(log.String()))
	}
	return nil
}

// logger collects the builder's messages for the case that it fails.
type logger struct{ w io.Writer }

var _ ulog.Logger = logger{}

func (l logger) Printf(format string, v ...any) { fmt.Fprintf(l.w, format+"\n", v...) }
func (l logger) Print(v ...any)                 { fmt.Fprintln(l.w, v...) }

func goEnv(ctx context.Context) (map[string]string, error) {
	out, err := command(ctx, "", "env", "-json", "GOROOT")
	if err != nil {
		return nil, err
	}
	var env map[string]string
	return env, json.Unmarshal(out, &env)
}

