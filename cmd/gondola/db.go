//go:build !lean

package main

import (
	"context"
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/gondola-vmm/gondola/scheduler/db"
)

// databaseFlag adds --database, which is where gondola rules, sched and others keep
// what they know.
func databaseFlag(c *cobra.Command, path *string) {
	c.PersistentFlags().StringVar(path, "database", "", "the database's file (default $XDG_STATE_HOME/gondola/gondola.db)")
}

// openDB opens the database at path, or at the usual place.
func openDB(ctx context.Context, path string, o db.Options) (*db.DB, error) {
	if path == "" {
		var err error
		if path, err = db.DefaultPath(); err != nil {
			return nil, err
		}
	}
	o.Say = func(s string) { fmt.Fprintf(os.Stderr, "gondola: %s\n", s) }
	return db.Open(ctx, path, o)
}

func dbCommand() *cobra.Command {
	var path string
	c := &cobra.Command{
		Use:   "db",
		Short: "Ask the database of what machines did and what was done to them",
		Long: `Ask the database in which gondola rules, gondola service and others keep what they
saw and what they did, with SQL (SQLite). Nothing is changed by these commands.
docs/database.md describes the tables.`,
		Example: `  gondola db query 'SELECT * FROM action_history ORDER BY time_ms DESC LIMIT 20'
  gondola db export --format csv process_history > processes.csv
  gondola db tables`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	databaseFlag(c, &path)
	c.AddCommand(dbQueryCommand(&path), dbExportCommand(&path), dbTablesCommand(&path))
	return c
}

// dbTimeout is the default of how long a question may take.
const dbTimeout = 30 * time.Second

// ask asks the database and writes the rows.
func ask(ctx context.Context, path string, timeout time.Duration, query string, args []any, out rows) error {
	ctx, cancel := context.WithTimeoutCause(ctx, timeout, errTimeout)
	defer cancel()
	d, err := openDB(ctx, path, db.Options{ReadOnly: true})
	if err != nil {
		return err
	}
	defer d.Close()
	if err := d.Query(ctx, query, args, out.row); err != nil {
		if ctx.Err() != nil {
			return fmt.Errorf("the question takes longer than --timeout %v: %w", timeout, context.Cause(ctx))
		}
		return err
	}
	return out.end()
}

func dbQueryCommand(path *string) *cobra.Command {
	var asJSON bool
	timeout := dbTimeout
	c := &cobra.Command{
		Use:   "query SQL [ARGUMENT…]",
		Short: "Ask with one SQL statement; ? stands for an argument",
		Example: `  gondola db query 'SELECT name, class, cpu_ms FROM process_history WHERE machine = ? ORDER BY time_ms DESC LIMIT 10' web
  gondola db query --json 'SELECT count(*) AS n FROM cycles'`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 || strings.TrimSpace(args[0]) == "" {
				return usageError{errors.New("gondola db query takes a SQL statement; gondola db tables shows what there is")}
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			values := make([]any, len(args)-1)
			for i, a := range args[1:] {
				values[i] = a
				if n, err := strconv.ParseInt(a, 10, 64); err == nil {
					values[i] = n
				}
			}
			var out rows = &tableRows{w: tabwriter.NewWriter(cmd.OutOrStdout(), 0, 8, 2, ' ', 0)}
			if asJSON {
				out = &jsonRows{w: cmd.OutOrStdout()}
			}
			return ask(cmd.Context(), *path, timeout, args[0], values, out)
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print every row as a line of JSON")
	c.Flags().DurationVar(&timeout, "timeout", timeout, "how long the question may take")
	return c
}

func dbExportCommand(path *string) *cobra.Command {
	var format, output string
	timeout := 10 * time.Minute
	c := &cobra.Command{
		Use:   "export [TABLE]",
		Short: "Write a table, or a copy of the whole database",
		Long: `Write a table or view as lines of JSON or as CSV, or a copy of the whole database,
which is consistent while others go on writing.`,
		Example: `  gondola db export action_history > actions.jsonl
  gondola db export --format csv -o connections.csv connections
  gondola db export --format sqlite -o copy.db`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			if format == "sqlite" {
				if output == "" || len(args) > 0 {
					return usageError{errors.New("--format sqlite copies the whole database to the file of -o")}
				}
				d, err := openDB(cmd.Context(), *path, db.Options{ReadOnly: true})
				if err != nil {
					return err
				}
				defer d.Close()
				return d.CopyTo(cmd.Context(), output)
			}
			if len(args) == 0 {
				return usageError{errors.New("gondola db export takes the name of a table; gondola db tables shows them")}
			}
			w := cmd.OutOrStdout()
			if output != "" {
				f, err := os.OpenFile(output, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
				if err != nil {
					return err
				}
				defer func() { err = errors.Join(err, f.Close()) }()
				w = f
			}
			var out rows
			switch format {
			case "json":
				out = &jsonRows{w: w}
			case "csv":
				out = &csvRows{w: csv.NewWriter(w)}
			default:
				return usageError{fmt.Errorf("--format %s: choose json, csv or sqlite", format)}
			}
			return ask(cmd.Context(), *path, timeout, `SELECT * FROM "`+strings.ReplaceAll(args[0], `"`, `""`)+`"`, nil, out)
		},
	}
	c.Flags().StringVar(&format, "format", "json", "json (a line for each row), csv or sqlite")
	c.Flags().StringVarP(&output, "output", "o", "", "file to write to (default standard output)")
	c.Flags().DurationVar(&timeout, "timeout", timeout, "how long it may take")
	return c
}

func dbTablesCommand(path *string) *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use:   "tables",
		Short: "List the tables and views with their columns",
		Args:  noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var out rows = &tableRows{w: tabwriter.NewWriter(cmd.OutOrStdout(), 0, 8, 2, ' ', 0)}
			if asJSON {
				out = &jsonRows{w: cmd.OutOrStdout()}
			}
			return ask(cmd.Context(), *path, dbTimeout, `SELECT s.type, s.name, (SELECT group_concat(name, ', ') FROM pragma_table_info(s.name)) AS columns
				FROM sqlite_schema s WHERE s.type IN ('table', 'view') AND s.name NOT LIKE 'sqlite_%' ORDER BY s.type, s.name`, nil, out)
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "machine-readable")
	return c
}

// rows is a form in which the rows of an answer are written.
type rows interface {
	row(columns []string, row []any) error
	end() error
}

type jsonRows struct{ w io.Writer }

func (j *jsonRows) row(columns []string, row []any) error {
	m := make(map[string]any, len(row))
	for i, v := range row {
		m[columns[i]] = v
	}
	return printJSONLine(j.w, m)
}

func (j *jsonRows) end() error { return nil }

type csvRows struct {
	w    *csv.Writer
	some bool
}

func (c *csvRows) row(columns []string, row []any) error {
	if !c.some {
		c.some = true
		if err := c.w.Write(columns); err != nil {
			return err
		}
	}
	return c.w.Write(cells(row))
}

func (c *csvRows) end() error {
	c.w.Flush()
	return c.w.Error()
}

type tableRows struct {
	w    *tabwriter.Writer
	some bool
}

func (t *tableRows) row(columns []string, row []any) error {
	if !t.some {
		t.some = true
		if _, err := fmt.Fprintln(t.w, strings.ToUpper(strings.Join(columns, "\t"))); err != nil {
			return err
		}
	}
	all := cells(row)
	for i := range all {
		all[i] = printable(all[i]) // a guest chose some of it
	}
	_, err := fmt.Fprintln(t.w, strings.Join(all, "\t"))
	return err
}

func (t *tableRows) end() error { return t.w.Flush() }

func cells(row []any) []string {
	all := make([]string, len(row))
	for i, v := range row {
		switch v := v.(type) {
		case nil:
		case []byte:
			all[i] = string(v)
		default:
			all[i] = fmt.Sprint(v)
		}
	}
	return all
}
