package house

import (
	"os"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/stretchr/testify/require"
)

func TestTheHouseIsInOrder(t *testing.T) {
	root := os.DirFS("../..")
	mod, err := os.ReadFile("../../go.mod")
	require.NoError(t, err)
	require.True(t, strings.HasPrefix(string(mod), "module "+module+"\n"))
	wrong, err := Check(root)
	require.NoError(t, err)
	require.Empty(t, wrong, strings.Join(wrong, "\n"))
}

func TestEveryImportThatDesignDoesNotAllowIsFound(t *testing.T) {
	for _, c := range []struct {
		from, to string
		allowed  bool
	}{
		{"cmd/silo-nbd", "pkg/migrate", true},
		{"cmd/silo-nbd", "pkg/nbdexport", true},
		{"cmd/silo-nbd", "pkg/storage/sources", true},
		{"cmd/silo-nbd", "internal/addr", true},
		{"cmd/silo-nbd", "pkg/protocol", false},
		{"cmd/silo-nbd", "pkg/protocol/wire", false},
		{"pkg/migrate", "pkg/protocol", true},
		{"pkg/migrate", "pkg/lazy", true},
		{"pkg/migrate", "pkg/nbdexport", false},
		{"pkg/migrate", "pkg/storage/sources", false},
		{"pkg/migrate", "internal/addr", false},
		{"pkg/protocol", "pkg/protocol/wire", true},
		{"pkg/protocol", "pkg/storage", true},
		{"pkg/protocol", "pkg/lazy", false},
		{"pkg/protocol/wire", "pkg/storage", false},
		{"pkg/protocol/wire", "pkg/protocol", false},
		{"pkg/lazy", "pkg/storage", true},
		{"pkg/lazy", "pkg/protocol", false},
		{"pkg/lazy", "pkg/protocol/wire", false},
		{"pkg/lazy", "pkg/nbdexport", false},
		{"pkg/nbdexport", "pkg/storage", false},
		{"pkg/nbdexport", "pkg/lazy", false},
		{"pkg/storage", "pkg/storage/sources", false},
		{"pkg/storage/sources", "pkg/storage", true},
		{"pkg/storage/sources", "internal/units", false},
		{"pkg/new", "pkg/storage", false},
		{"internal/demo", "pkg/migrate", true},
		{"internal/lab/lives", "internal/control", true},
		{"internal/lab/lives", "internal/lab/faults", true},
		{"internal/demo", "internal/lab/lives", false},
		{"cmd/silo-nbd", "internal/lab/lives", false},
		{"pkg/lazy", "internal/lab/lives", false},
	} {
		source := "package x\n\nimport _ \"" + module + "/" + c.to + "\"\n"
		root := fstest.MapFS{c.from + "/x.go": {Data: []byte(source)}, c.from + "/x_test.go": {Data: []byte(source)}}
		wrong, err := Check(root)
		require.NoError(t, err)
		if c.allowed {
			require.Empty(t, wrong)
		} else {
			require.Len(t, wrong, 1, "%s imports %s", c.from, c.to)
			require.Contains(t, wrong[0], c.from+"/x.go:3: "+c.from)
		}
	}
}

func TestForeignPackagesStayWhereTheyBelong(t *testing.T) {
	for _, c := range []struct {
		from, to string
		allowed  bool
	}{
		{"pkg/nbdexport", goNBD + "/pkg/backend", true},
		{"pkg/lazy", goNBD + "/pkg/backend", false},
		{"cmd/silo-nbd", "github.com/loopholelabs/silo/pkg/storage", false},
		{"pkg/protocol/wire", "encoding/binary", true},
		{"pkg/protocol/wire", "sync/atomic", false},
		{"pkg/protocol/wire", "context", false},
	} {
		wrong, err := Check(fstest.MapFS{c.from + "/x.go": {Data: []byte("package x\n\nimport _ \"" + c.to + "\"\n")}})
		require.NoError(t, err)
		require.Equal(t, c.allowed, len(wrong) == 0, "%s imports %s: %v", c.from, c.to, wrong)
	}
}

func TestSleepsAndBareGoroutinesAreFound(t *testing.T) {
	for source, want := range map[string]string{
		"package x\n\nfunc f() {\n\tgo f()\n}\n":                                "pkg/x/x.go:4: bare go statement",
		"package x\n\nimport \"time\"\n\nfunc f() { time.Sleep(1) }\n":          "pkg/x/x.go:5: time.Sleep",
		"package x\n\nimport clock \"time\"\n\nvar s = clock.Sleep\n":           "pkg/x/x.go:5: time.Sleep",
		"package x\n\nimport . \"time\"\n\nfunc f() { Sleep(1) }\n":             "pkg/x/x.go:5: time.Sleep",
		"package x\n\n// go f() and time.Sleep\nvar time struct{ Sleep int }\n": "",
	} {
		wrong, err := Check(fstest.MapFS{
			"pkg/x/x.go":           {Data: []byte(source)},
			"pkg/x/x_test.go":      {Data: []byte(source)},
			"internal/x/x.go":      {Data: []byte(source)},
			".cache/x.go":          {Data: []byte("no Go")},
			"pkg/x/testdata/x.go":  {Data: []byte("no Go")},
			"pkg/x/not-go.go.orig": {Data: []byte("no Go")},
		})
		require.NoError(t, err)
		if want == "" {
			require.Empty(t, wrong)
			continue
		}
		require.Len(t, wrong, 1)
		require.Contains(t, wrong[0], want)
	}
}

func TestLongFilesAreFound(t *testing.T) {
	long := "package x\n" + strings.Repeat("\n", maxLines-2)
	for _, name := range []string{"cmd/x/x.go", "pkg/x/x_test.go"} {
		wrong, err := Check(fstest.MapFS{name: {Data: []byte(long)}})
		require.NoError(t, err)
		require.Empty(t, wrong, "one line less is allowed")
		wrong, err = Check(fstest.MapFS{name: {Data: []byte(long + "\n")}})
		require.NoError(t, err)
		require.Equal(t, []string{name + ":600: the file has 600 lines: split it, each has less than 600"}, wrong)
	}
}
